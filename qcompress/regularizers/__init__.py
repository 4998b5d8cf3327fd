"""Weight regularizers are what training adds to its loss so that quantization loses less. One file each."""

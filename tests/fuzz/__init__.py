"""A fuzzer of our own: sound files of every kind are mutated, and read as the commands read them."""

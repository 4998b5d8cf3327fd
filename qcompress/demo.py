def run_demo(folder):
    raise NotImplementedError

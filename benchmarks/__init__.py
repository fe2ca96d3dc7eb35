if __name__ != "isthmus.benchmarks":
    raise ImportError("this folder is the package isthmus.benchmarks: import it by that name")

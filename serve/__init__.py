if __name__ != "isthmus.serve":
    raise ImportError("this folder is the package isthmus.serve: import it by that name")

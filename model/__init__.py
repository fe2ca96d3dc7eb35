if __name__ != "isthmus.model":
    raise ImportError("this folder is the package isthmus.model: import it by that name")

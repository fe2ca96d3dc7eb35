if __name__ != "isthmus.train":
    raise ImportError("this folder is the package isthmus.train: import it by that name")

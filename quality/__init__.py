if __name__ != "isthmus.quality":
    raise ImportError("this folder is the package isthmus.quality: import it by that name")

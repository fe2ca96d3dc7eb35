if __name__ != "isthmus.commands":
    raise ImportError("this folder is the package isthmus.commands: import it by that name")

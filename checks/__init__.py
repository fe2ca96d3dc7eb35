if __name__ != "isthmus.checks":
    raise ImportError("this folder is the package isthmus.checks: import it by that name")

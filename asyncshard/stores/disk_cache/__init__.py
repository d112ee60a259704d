"""A cache of other stores' objects on a disk of this machine, shared by its processes.

Its modules need the extra ``cache``, all but `report`.
"""

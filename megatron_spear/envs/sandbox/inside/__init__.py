"""What runs inside a warm worker: standard library only, any Python from 3.8 on.

These sources are sent to the worker's interpreter, which does not have this package.
"""

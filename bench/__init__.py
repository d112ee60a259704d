"""The benchmark: ``python -m bench`` measures what loading costs. It is neither part of the library nor a test."""

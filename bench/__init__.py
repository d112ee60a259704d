"""What loading costs: ``python -m bench``. Nothing here is part of the library, and nothing here is a test."""

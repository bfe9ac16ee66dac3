"""Its place makes the modules beside it (tiny.py) importable from every test."""

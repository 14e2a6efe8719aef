"""Modules that the scripts share. Users start none of them."""

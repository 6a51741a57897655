"""Certificates between Tandem's processes: where they are, whether they can be used, and how to make them."""

"""One model out of several that were aligned, and what lies between them."""

"""A web page on a tokenizer and its priors.

`uploads`, `decoding` and `workbench` are its logic; `page`, `guard` and `serving` the web.
"""

"""A web page for a tokenizer and its priors.

`uploads`, `decoding` and `workbench` contain its logic; `page`, `guard` and `serving` its web server.
"""

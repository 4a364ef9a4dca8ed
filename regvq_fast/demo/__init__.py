"""A web page on a tokenizer and its priors: `uploads` and `workbench` are its logic, `page` and `serving` the web."""

"""Generative models over tokens, with a folder for each; `regvq_fast.priors.registry` lists them."""

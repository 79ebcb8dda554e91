"""The triton backend: GPU. Its modules import Triton, and are imported when a call first needs them."""

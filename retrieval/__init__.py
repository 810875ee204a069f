"""Which text does a picture find? CLIP R-precision and similarity of views, for results of any prompt."""

"""The field of a run while one turns it: pictures of any camera at any moment, and a page that shows them."""

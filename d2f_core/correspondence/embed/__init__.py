"""Teachers' features of images, computed once per image however many pairs use it."""

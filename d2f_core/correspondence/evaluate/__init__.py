"""How well a matcher matches: points of pairs of images, predicted and scored."""

"""Tables that this project makes by itself: captioned drawings, and rendered scenes with their depth."""

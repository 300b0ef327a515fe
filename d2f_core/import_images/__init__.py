"""Tables of people's own images: read, checked, made alike, looked at, and parted into training and held-out images."""

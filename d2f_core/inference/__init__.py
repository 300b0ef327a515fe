"""Ray Data jobs: images to latents, prompts to images, and pictures of the result."""

"""Rails of Ray Data jobs, whatever they make."""

"""Results to point at: layers, their channels, prompts and both of their responses, in a notebook or one offline file."""

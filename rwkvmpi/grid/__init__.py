"""Who owns what (layout), in which order it is done (wavefront), and how it travels (transport)."""

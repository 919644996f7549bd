"""NequIP and Allegro adapter of GAQ (empty in this version)."""

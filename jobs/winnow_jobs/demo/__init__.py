"""The demo: the main job on photographs, then the whole loop on rendered surfaces."""

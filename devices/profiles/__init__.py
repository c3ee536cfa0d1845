"""Board profiles as YAML; read with importlib.resources."""

"""The YAML files that choose values for the options declared in pipeline/config/."""

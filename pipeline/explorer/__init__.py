"""A page on loopback that shows what a code keeps of an image."""

"""What `fusionroute bench` measures, and how it is shown."""

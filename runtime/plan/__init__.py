"""What `fusionroute plan` says before an export: what fits a device, how fast, and which precision to take."""

"""What `fusionroute plan` says before an export: what fits a device, how fast it would be, and which precision to take."""

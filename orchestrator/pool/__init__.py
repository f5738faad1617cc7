"""The only place that schedules: workers, where they are placed, their calls, and their failures."""

"""Settings: sections, rules, recipes, schedules."""

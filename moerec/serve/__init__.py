"""A finished run that answers: requests, recommendations, profiles of users and their store."""

# Flags of the commands that take new tables (`moerec.serve.new_data`).
NEW_TABLES = {
    "interactions": ("", "a table of new events, with the columns of the run's own"),
    "items": ("", "a table of new items, with the columns of the run's own"),
    "user_table": ("", "a table of new users' profile fields, with the columns of the run's own"),
}

"""Plans found by searches, by target, for `moqc.schedules.plan_records`."""

-- What each role may do in the database, beside its owner: who makes the tables (`fraudctl migrate`), and runs this after.
--   psql "$OWNER_URL" -f deploy/grants.sql
-- The roles are made before, each with a password of its own: CREATE ROLE db_sink LOGIN; \password db_sink
-- The producer, the predictor and the alerter have none.

-- By default, everybody may connect and see what there is.
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;

-- db_sink: stores, and loads each batch by way of a temporary table; sees whether the schema is up to date
GRANT CONNECT ON DATABASE :"DBNAME" TO db_sink;
GRANT TEMPORARY ON DATABASE :"DBNAME" TO db_sink;
GRANT USAGE ON SCHEMA public TO db_sink;
GRANT SELECT ON alembic_version TO db_sink;
GRANT SELECT ON transactions TO db_sink;
GRANT INSERT ON transactions TO db_sink;
GRANT UPDATE ON transactions TO db_sink;

-- labels: `fraudctl labels`; changes labels and nothing else, and cannot rewrite who changed what
GRANT CONNECT ON DATABASE :"DBNAME" TO labels;
GRANT TEMPORARY ON DATABASE :"DBNAME" TO labels;
GRANT USAGE ON SCHEMA public TO labels;
GRANT SELECT ON transactions TO labels;
GRANT UPDATE (is_fraud, validated_at, validated_by) ON transactions TO labels;
GRANT INSERT ON label_changes TO labels;

-- exporter: `fraudctl export`, `status` and `labels stats`; reads
GRANT CONNECT ON DATABASE :"DBNAME" TO exporter;
GRANT USAGE ON SCHEMA public TO exporter;
GRANT SELECT ON alembic_version TO exporter;
GRANT SELECT ON transactions TO exporter;

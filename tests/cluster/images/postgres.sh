# What the official image's entry point does, for the settings that the quickstart makes.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    (umask 077 && printf '%s' "$POSTGRES_PASSWORD" >/tmp/password)
    initdb -D "$PGDATA" -U "$POSTGRES_USER" --auth-local=trust --auth-host=scram-sha-256 --pwfile=/tmp/password -E UTF8 --no-instructions \
        --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8
    rm /tmp/password
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -D "$PGDATA" postgres
fi
exec postgres -D "$PGDATA" -h '*' -k /var/run/postgresql "$@"

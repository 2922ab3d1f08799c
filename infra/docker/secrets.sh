#!/bin/sh
# Creates infra/docker/secrets/ with Ray's token, the password of Grafana's `admin` and the key of the S3 server, each once.
# Only its owner may enter the folder. Its files are world-readable, because the users in the containers are not its owner.
set -eu
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder"

random() { od -An -tx1 -N32 /dev/urandom | tr -d ' \n'; }

once() { # once FILE TEXT: atomic; without a trailing newline, which would be part of a password
    [ -s "$folder/$1" ] && return
    printf '%s' "$2" >"$folder/$1.new"
    chmod 644 "$folder/$1.new"
    mv "$folder/$1.new" "$folder/$1"
}

once ray_auth_token "$(random)"
once grafana_password "$(random)"
once s3.env "$(printf 'AWS_ACCESS_KEY_ID=p2r\nAWS_SECRET_ACCESS_KEY=%s' "$(random)")"
echo "secrets are in $folder"

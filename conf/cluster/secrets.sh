#!/usr/bin/env bash
# Makes what a cluster's nodes must know and nobody else may: a token for Ray, keys for the S3 server, and the
# password of Grafana's user admin.
# Usage: secrets.sh FOLDER
#
# What is there stays as it is. Only the owner of the folder gets into it; its files can be read by whoever is
# given them, since the user of a container is another one.
set -euo pipefail
folder=${1:?the folder for the secrets}
random() { od --address-radix=n --format=x1 --read-bytes="$1" /dev/urandom | tr -d ' \n'; }

mkdir -p "$folder"
chmod 700 "$folder"
umask 022
for name in ray_token grafana_password; do
    if [ ! -e "$folder/$name" ]; then
        printf '%s' "$(random 32)" > "$folder/$name"
    fi
done
if [ ! -e "$folder/s3_server" ]; then
    key=$(random 10)
    secret=$(random 20)
    cat > "$folder/s3_client" <<END
[default]
aws_access_key_id = $key
aws_secret_access_key = $secret
END
    cat > "$folder/s3_server" <<END
{"identities": [{"name": "darwin", "credentials": [{"accessKey": "$key", "secretKey": "$secret"}],
                 "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
END
fi

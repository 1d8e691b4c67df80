{{/* The in-chart store's configuration file. Valkey 8 and Redis 7.2 and later read it alike. */}}
{{- define "progressdb-kms.redisConfig" -}}
# TLS only, with a certificate from every caller; the socket is for the sidecar and the probes in this pod.
port 0
tls-port 6379
tls-auth-clients yes
tls-protocols "TLSv1.3"
tls-cert-file /etc/redis/tls/tls.crt
tls-key-file /etc/redis/tls/tls.key
tls-ca-cert-file /etc/redis/tls/ca.crt
unixsocket /run/redis/redis.sock
unixsocketperm 770
# Nobody gets in without an ACL user; `default` is off.
aclfile /etc/redis/auth/users.acl
# Every acknowledged write is on disk; the service refuses a store that is set up otherwise.
dir /data
appendonly yes
appendfsync always
no-appendfsync-on-rewrite no
# A tail torn by a power cut was never acknowledged.
aof-load-truncated yes
aof-use-rdb-preamble yes
auto-aof-rewrite-percentage {{ int64 .Values.redis.autoAofRewritePercentage }}
auto-aof-rewrite-min-size {{ .Values.redis.autoAofRewriteMinSize }}
save ""
# A full store says so; it never drops keys.
maxmemory {{ .Values.redis.maxmemory }}
maxmemory-policy noeviction
maxclients {{ int64 .Values.redis.maxclients }}
tcp-keepalive 60
timeout 0
{{- end }}

{{/*
users.acl, as a template for provision: #{NAME} becomes the SHA-256 of that user's password. The service's commands are
those of docs/redis-acl.md. `default` keeps its rights while it is off: the append-only file is loaded as that user.
*/}}
{{- define "progressdb-kms.redisAcl" -}}
user default off resetpass ~* &* +@all
user kms on #{kms} resetkeys ~kms:* resetchannels -@all +select +info +config|get +time +eval +evalsha +exists +hget +hmget +hgetall +hkeys +hvals +hset +hdel +hincrby +sadd +srem +scard +zadd +zrem +zrange +zrevrange +scan +xadd +xrange +xread +xinfo|stream +wait +waitaof +del +get +hexists +hlen +hsetnx +incr +set +sscan +unlink +zcard +zrangebyscore +bgrewriteaof +xtrim +xrevrange
user reload on #{reload} resetkeys resetchannels -@all +ping +config|set +acl|load
user probe on #{probe} resetkeys resetchannels -@all +ping
{{ end }}

{{/* PONG is not said while the append-only file is still being loaded. */}}
{{- define "progressdb-kms.redisProbe" -}}
cli=$(command -v valkey-cli || command -v redis-cli) || exit 1
REDISCLI_AUTH=$(cat /etc/redis/auth/probe) || exit 1
export REDISCLI_AUTH
VALKEYCLI_AUTH=$REDISCLI_AUTH
export VALKEYCLI_AUTH
[ "$("$cli" -s /run/redis/redis.sock --user probe --no-auth-warning ping)" = PONG ]
{{- end }}

{{/*
Combinations that the schema can't see and that can't work, refused before anything is created. Each message says what to do.
*/}}
{{- define "progressdb-kms.checks" -}}
{{- $tls := .Values.tls -}}
{{- $cm := $tls.certManager -}}
{{- $redisMode := include "progressdb-kms.redisTlsMode" . -}}
{{- if not (regexMatch "^[a-z]" (include "progressdb-kms.fullname" .)) }}
{{- fail "a Service's name begins with a letter: give the release such a name, or set fullnameOverride" }}
{{- end }}
{{- include "progressdb-kms.checkStore" . -}}
{{- include "progressdb-kms.checkClients" . -}}
{{- if ne .Values.kek.management "create" }}
{{- if not .Values.kek.secretName }}
{{- fail (printf "kek.management %s needs kek.secretName: make a Secret with the KEK file under the key %s (progressdb-kms kek init --file kek.yaml), and name it" .Values.kek.management .Values.kek.key) }}
{{- end }}
{{- end }}
{{- if and (eq .Values.kek.management "create") .Values.kek.storeIdKey (eq .Values.kek.storeIdKey .Values.kek.key) }}
{{- fail "kek.key and kek.storeIdKey must be two keys of the Secret: change one of them" }}
{{- end }}
{{- if eq $tls.mode "existingSecret" }}
{{- if not $tls.existingSecret.server }}
{{- fail "tls.mode existingSecret needs tls.existingSecret.server: a Secret with tls.crt and tls.key for the names of the Service" }}
{{- end }}
{{- if not $tls.existingSecret.clientCa }}
{{- fail "tls.mode existingSecret needs tls.existingSecret.clientCa: a Secret with the CAs that clients may come from. Clients without a certificate are never let in" }}
{{- end }}
{{- range .Values.clients }}
{{- if .certificate }}
{{- fail (printf "clients: %s has certificate: true, but with tls.mode existingSecret no certificates are made: remove it, and bring the client's certificate yourself" .name) }}
{{- end }}
{{- end }}
{{- end }}
{{- if eq $tls.mode "certManager" }}
{{- with $cm.client }}
{{- if .issuerRef.name }}
{{- if not .trustSecret }}
{{- fail "tls.certManager.client.issuerRef needs tls.certManager.client.trustSecret: a Secret with the CAs that clients may come from, and no others (a certificate's own ca.crt is not a trust bundle)" }}
{{- end }}
{{- if and (ne .issuerRef.kind "Issuer") (not .acknowledgeSharedIssuer) }}
{{- fail (printf "tls.certManager.client.issuerRef is a %s: any namespace that may use it can ask for the name of another's client. Leave the name empty for a CA of the release's own, or forbid that (deploy/cert-manager/approver-policy.yaml) and set tls.certManager.client.acknowledgeSharedIssuer: true" .issuerRef.kind) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $cm.client.issuerRef.name $cm.server.issuerRef.name) (eq $cm.client.issuerRef.kind $cm.server.issuerRef.kind) $cm.client.issuerRef.name (not $cm.client.acknowledgeSharedIssuer) }}
{{- fail "tls.certManager.client.issuerRef and tls.certManager.server.issuerRef are one issuer: give clients a CA of their own, or set tls.certManager.client.acknowledgeSharedIssuer: true" }}
{{- end }}
{{- end }}
{{- if and .Values.redis.enabled (eq $redisMode "certManager") $cm.redis.issuerRef.name (not $cm.redis.trustSecret) }}
{{- fail "tls.certManager.redis.issuerRef needs tls.certManager.redis.trustSecret: a Secret with the CAs of the store and its callers, and no others" }}
{{- end }}
{{- if or (eq $tls.mode "generated") (eq $redisMode "generated") }}
{{- if ge (int $tls.generated.renewBeforeDays) (int $tls.generated.days) }}
{{- fail "tls.generated.renewBeforeDays must be less than tls.generated.days: else certificates would be renewed at each run" }}
{{- end }}
{{- if gt (int $tls.generated.days) (int $tls.generated.caDays) }}
{{- fail "tls.generated.caDays must be at least tls.generated.days: no certificate outlives its CA" }}
{{- end }}
{{- end }}
{{- if and .Values.backup.enabled (eq .Values.backup.destination "s3") (not .Values.backup.s3.url) }}
{{- fail "backup.destination s3 needs backup.s3.url: s3://bucket/prefix" }}
{{- end }}
{{- with .Values.settings.limits }}
{{- if lt (mul 3 (int64 .bodyBytes)) (add (mul 4 (int64 .plaintextBytes)) 3072) }}
{{- fail "settings.limits.bodyBytes is too small for settings.limits.plaintextBytes in base64: give it a third more and 1024" }}
{{- end }}
{{- end }}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- fail "autoscaling.maxReplicas must be at least autoscaling.minReplicas" }}
{{- end }}
{{- end }}

{{- define "progressdb-kms.checkStore" -}}
{{- if .Values.redis.enabled }}
{{- if .Values.externalStore.url }}
{{- fail "redis.enabled and externalStore.url are two stores: set redis.enabled: false, or leave the URL empty" }}
{{- end }}
{{- if eq (include "progressdb-kms.redisTlsMode" .) "existingSecret" }}
{{- range $key := list "server" "client" "ca" }}
{{- if not (index $.Values.redis.tls.existingSecret $key) }}
{{- fail (printf "redis.tls.existingSecret.%s is missing: name the Secret, or set redis.tls.mode: generated to have the store's certificates made" $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- else }}
{{- with .Values.externalStore }}
{{- if not .url }}
{{- fail "redis.enabled is false, so externalStore.url is needed: rediss://host:port/0, rediss+sentinel://h1:p,h2:p/name or rediss+cluster://h1:p,h2:p" }}
{{- end }}
{{- if regexMatch "^[a-z+]+://[^/?]*@" .url }}
{{- fail "externalStore.url must hold no user or password: set externalStore.username, and put the password into the Secret externalStore.secretName" }}
{{- end }}
{{- if not .secretName }}
{{- fail (printf "externalStore.secretName is needed: a Secret with the store's password under the key %s and its CA under %s" .passwordKey .caKey) }}
{{- end }}
{{- if and (hasPrefix "redis" .url) (not (hasPrefix "rediss" .url)) (not .allowPlaintext) }}
{{- fail "externalStore.url is without TLS: use rediss://, or set externalStore.allowPlaintext: true if the network between is encrypted otherwise" }}
{{- end }}
{{- if and (hasPrefix "rediss" .url) (not .caKey) }}
{{- fail "externalStore.caKey is needed: the key of the Secret with the CA of the store's certificate" }}
{{- end }}
{{- if ne (empty .certKey) (empty .keyKey) }}
{{- fail "externalStore.certKey and externalStore.keyKey belong together: give both, or neither" }}
{{- end }}
{{- if and (eq .durability "attested") (not (trim .attestedReason)) }}
{{- fail "externalStore.durability attested needs externalStore.attestedReason: why is the store durable?" }}
{{- end }}
{{- if and (regexMatch "^rediss?\\+(sentinel|cluster)://" .url) (lt (int .minReplicas) 1) (ne .durability "attested") }}
{{- fail "externalStore.minReplicas must be at least 1 with Sentinel or Cluster: a promoted replica that lacks a write loses it" }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "progressdb-kms.checkClients" -}}
{{- $names := dict -}}
{{- $secrets := dict -}}
{{- $identities := dict -}}
{{- range (include "progressdb-kms.clients" . | fromJson).clients }}
{{- if hasKey $names .name }}
{{- fail (printf "clients: two are named %s; `test` is the release's own while test.enabled: give each a name of its own" .name) }}
{{- end }}
{{- $_ := set $names .name true }}
{{- if hasKey $identities .identity }}
{{- fail (printf "clients: two have the identity %s: give each one of its own, or make them one client" .identity) }}
{{- end }}
{{- $_ := set $identities .identity true }}
{{- if .certificate }}
{{- if contains "*" .identity }}
{{- fail (printf "clients: %s has the pattern %s as identity, for which no certificate can be made: name one identity, or set certificate: false" .name .identity) }}
{{- end }}
{{- $secret := printf "%s/%s" .namespace .secretName }}
{{- if hasKey $secrets $secret }}
{{- fail (printf "clients: two want the Secret %s: set secretName of one of them" $secret) }}
{{- end }}
{{- $_ := set $secrets $secret true }}
{{- end }}
{{- end }}
{{- end }}

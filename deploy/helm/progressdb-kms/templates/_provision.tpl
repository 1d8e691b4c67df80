{{/*
What the bootstrap and the renewal make (docs/provisioning.md), as JSON objects, so that the jobs' rights follow from the
same lists: `passwords`, `certificates`, `kek`, `store`; the renewal takes `certificates` alone.
*/}}
{{- define "progressdb-kms.provisionCertificates" -}}
{{- $r := include "progressdb-kms.fullname" . -}}
{{- $made := .Values.tls.generated -}}
{{- $authorities := list -}}
{{- $bundles := list -}}
{{- $leaves := list -}}
{{- $copies := list -}}
{{- $redisMode := include "progressdb-kms.redisTlsMode" . -}}
{{- if eq .Values.tls.mode "generated" }}
{{- range $name := list "server" "client" }}
{{- $authorities = append $authorities (dict "name" $name "secret" (printf "%s-%s-ca" $r $name) "common_name" (printf "%s %s CA" $r $name) "days" (int $made.caDays)) }}
{{- end }}
{{- $bundles = append $bundles (dict "secret" (printf "%s-client-ca-bundle" $r) "authorities" (list "client")) }}
{{- $names := concat (include "progressdb-kms.dnsNames" (dict "root" . "service" $r) | fromJsonArray) (list "localhost") .Values.tls.extraNames }}
{{- $leaves = append $leaves (dict "secret" (printf "%s-server-tls" $r) "authority" "server" "usage" "server" "dns" $names "ip" .Values.tls.extraIPs "days" (int $made.days)) }}
{{- range (include "progressdb-kms.clients" . | fromJson).clients }}
{{- if .certificate }}
{{- $leaf := dict "secret" .secretName "authority" "client" "usage" "client" "common_name" .name "days" (int $made.days) "keep_key" (default false .pinned) "trust" (list "server") }}
{{- if ne .namespace $.Release.Namespace }}{{ $_ := set $leaf "namespace" .namespace }}{{ end }}
{{- $_ := merge $leaf (include "progressdb-kms.subject" .identity | fromJson) }}
{{- if hasPrefix "cn:" .identity }}{{ $_ := set $leaf "common_name" (trimPrefix "cn:" .identity) }}{{ end }}
{{- $leaves = append $leaves $leaf }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.redis.enabled (eq $redisMode "generated") }}
{{- $authorities = append $authorities (dict "name" "redis" "secret" (printf "%s-redis-ca" $r) "common_name" (printf "%s redis CA" $r) "days" (int $made.caDays)) }}
{{- $bundles = append $bundles (dict "secret" (printf "%s-redis-ca-bundle" $r) "authorities" (list "redis")) }}
{{- $leaves = append $leaves (dict "secret" (printf "%s-redis-tls" $r) "authority" "redis" "usage" "server" "dns" (include "progressdb-kms.dnsNames" (dict "root" . "service" (printf "%s-redis" $r)) | fromJsonArray) "days" (int $made.days)) }}
{{- $leaves = append $leaves (dict "secret" (printf "%s-redis-client-tls" $r) "authority" "redis" "usage" "client" "common_name" "kms" "days" (int $made.days)) }}
{{- end }}
{{- if eq .Values.tls.mode "certManager" }}
{{- if not .Values.tls.certManager.client.issuerRef.name }}
{{- $bundles = append $bundles (dict "secret" (printf "%s-client-ca-bundle" $r) "secrets" (list (dict "secret" (printf "%s-client-ca" $r) "key" "tls.crt"))) }}
{{- end }}
{{- range (include "progressdb-kms.clients" . | fromJson).clients }}
{{- if and .certificate (include "progressdb-kms.clientIsCopied" (dict "root" $ "client" .)) }}
{{- $copy := dict "from" (include "progressdb-kms.clientSource" (dict "root" $ "client" .)) "secret" .secretName "namespace" .namespace "trust" (list (include "progressdb-kms.serverTrust" $ | fromYaml)) }}
{{- $copies = append $copies $copy }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.redis.enabled (eq $redisMode "certManager") (not .Values.tls.certManager.redis.issuerRef.name) }}
{{- $bundles = append $bundles (dict "secret" (printf "%s-redis-ca-bundle" $r) "secrets" (list (dict "secret" (printf "%s-redis-ca" $r) "key" "tls.crt"))) }}
{{- end }}
{{- $all := dict -}}
{{- if or $authorities $bundles $leaves $copies }}
{{- $_ := set $all "wait" (int .Values.bootstrap.wait) }}
{{- end }}
{{- with $authorities }}{{ $_ := set $all "authorities" . }}{{ $_ := set $all "renew_before" (int $made.renewBeforeDays) }}{{ end }}
{{- with $bundles }}{{ $_ := set $all "bundles" . }}{{ end }}
{{- with $leaves }}{{ $_ := set $all "certificates" . }}{{ end }}
{{- with $copies }}{{ $_ := set $all "copies" . }}{{ end }}
{{- toJson $all -}}
{{- end }}

{{/* The one name in a client's certificate, by which the service knows it. */}}
{{- define "progressdb-kms.subject" -}}
{{- if hasPrefix "dns:" . }}{{ toJson (dict "dns" (list (trimPrefix "dns:" .))) }}
{{- else if hasPrefix "spiffe:" . }}{{ toJson (dict "uri" (list .)) }}
{{- else }}{{ toJson dict }}
{{- end }}
{{- end }}

{{/* The whole of provision.yaml, as JSON. */}}
{{- define "progressdb-kms.provision" -}}
{{- $r := include "progressdb-kms.fullname" . -}}
{{- $create := eq .Values.kek.management "create" -}}
{{- $all := include "progressdb-kms.provisionBase" . | fromJson -}}
{{- $store := dict "config" "/etc/progressdb-kms/config.yaml" "wait" (int .Values.bootstrap.wait) -}}
{{- range $path, $from := include "progressdb-kms.storeFiles" . | fromYaml }}
{{- $_ := set $store (get (dict "password" "password" "ca.crt" "ca" "tls.crt" "cert" "tls.key" "key") $path) $from }}
{{- end }}
{{- $_ := set $all "store" $store -}}
{{- $kek := dict "secret" (include "progressdb-kms.kekSecret" .) "key" .Values.kek.key "management" (ternary "create" "require" $create) -}}
{{- with include "progressdb-kms.storeIdKey" . }}{{ $_ := set $kek "store_id_key" . }}{{ end }}
{{- if and $create .Values.kek.annotations }}{{ $_ := set $kek "annotations" .Values.kek.annotations }}{{ end }}
{{- $_ := set $all "kek" $kek -}}
{{- if and .Values.audit.enabled (not .Values.audit.secretName) }}
{{- $_ := set $all "audit" (dict "secret" (include "progressdb-kms.auditSecret" .) "key" .Values.audit.key) }}
{{- end }}
{{- if and .Values.redis.enabled (not .Values.redis.existingAuthSecret) }}
{{- $_ := set $all "passwords" (dict "secret" (include "progressdb-kms.redisAuthSecret" .) "users" (list "kms" "reload" "probe") "acl" (include "progressdb-kms.redisAcl" .)) }}
{{- end }}
{{- with include "progressdb-kms.provisionCertificates" . | fromJson }}{{ $_ := set $all "certificates" . }}{{ end }}
{{- toJson $all -}}
{{- end }}

{{/* No instance label on what a job makes: Argo CD would take it for an object that left the manifest, and prune it. */}}
{{- define "progressdb-kms.provisionBase" -}}
{{- $labels := dict "app.kubernetes.io/name" (include "progressdb-kms.name" .) "app.kubernetes.io/managed-by" "progressdb-kms" "progressdb-kms.io/release" .Release.Name -}}
{{- toJson (dict "namespace" .Release.Namespace "labels" (merge $labels .Values.commonLabels)) -}}
{{- end }}

{{/*
The Secrets that provision.yaml names, as JSON: for each namespace ("" is the release's) those it `writes` and those it only
`reads`. The jobs' rights are made from it: (dict "root" $ "provision" {...}).
*/}}
{{- define "progressdb-kms.provisionSecrets" -}}
{{- $writes := list -}}
{{- $reads := list -}}
{{- $others := dict -}}
{{- with .provision.passwords }}{{ $writes = append $writes .secret }}{{ end }}
{{- with .provision.audit }}{{ $writes = append $writes .secret }}{{ end }}
{{- with .provision.kek }}
{{- if eq .management "create" }}{{ $writes = append $writes .secret }}{{ else }}{{ $reads = append $reads .secret }}{{ end }}
{{- end }}
{{- range $key, $from := default dict .provision.store }}
{{- if kindIs "map" $from }}{{ $reads = append $reads $from.secret }}{{ end }}
{{- end }}
{{- with .provision.certificates }}
{{- range .authorities }}{{ $writes = append $writes .secret }}{{ end }}
{{- range .bundles }}
{{- $writes = append $writes .secret }}
{{- range .secrets }}{{ $reads = append $reads .secret }}{{ end }}
{{- end }}
{{- range concat (default list .certificates) (default list .copies) }}
{{- if and .namespace (ne .namespace $.root.Release.Namespace) }}
{{- $_ := set $others .namespace (append (default list (get $others .namespace)) .secret) }}
{{- else }}
{{- $writes = append $writes .secret }}
{{- end }}
{{- with .from }}{{ $reads = append $reads . }}{{ end }}
{{- range .trust }}{{ if kindIs "map" . }}{{ $reads = append $reads .secret }}{{ end }}{{ end }}
{{- end }}
{{- end }}
{{- $writes = $writes | uniq | sortAlpha -}}
{{- $only := list -}}
{{- range $reads | uniq | sortAlpha }}{{ if not (has . $writes) }}{{ $only = append $only . }}{{ end }}{{ end }}
{{- $lists := dict "" (dict "writes" $writes "reads" $only) -}}
{{- range $namespace, $secrets := $others }}{{ $_ := set $lists $namespace (dict "writes" ($secrets | uniq | sortAlpha) "reads" list) }}{{ end }}
{{- toJson $lists -}}
{{- end }}

{{/* Names and labels. R-rotate-dry-run must fit into the 52 characters of a CronJob's name, so R has at most 36. */}}
{{- define "progressdb-kms.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- end }}

{{- define "progressdb-kms.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "progressdb-kms.selectorLabels" -}}
app.kubernetes.io/name: {{ include "progressdb-kms.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "progressdb-kms.labels" -}}
{{ include "progressdb-kms.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (replace "+" "_" .Chart.Version) | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
The metadata of an object: (dict "root" $ "name" "-rotate" "component" "rotate" "annotations" {...} "namespace" "x" "exempt" [...]).
`exempt` names the checks of kube-score that do not hold here on purpose:
- container-resources: there is no CPU limit, since throttling shows as latency. Memory and disk have limits.
- container-image-pull-policy: a value; IfNotPresent, since images are named by version or digest.
- container-security-context-user-group-id: the store's image owns its files by 999, and null leaves ids to the cluster.
- deployment-has-host-podantiaffinity: topologySpreadConstraints do it, for zones too, and let two share the only node.
- pod-probes-identical: a store that answers is alive and ready; liveness only has far more patience.
*/}}
{{- define "progressdb-kms.metadata" -}}
name: {{ include "progressdb-kms.fullname" .root }}{{ .name }}
namespace: {{ default .root.Release.Namespace .namespace }}
labels:
  {{- include "progressdb-kms.labels" .root | nindent 2 }}
  {{- with .component }}
  app.kubernetes.io/component: {{ . }}
  {{- end }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
{{- with .exempt }}{{ $_ := set $annotations "kube-score/ignore" (join "," .) }}{{ end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Labels of a pod: (dict "root" $ "component" "service" "podLabels" {...}). No version: upgrades must not touch them needlessly. */}}
{{- define "progressdb-kms.podLabels" -}}
{{- with merge (dict) (default dict .podLabels) .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{ include "progressdb-kms.selectorLabels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "progressdb-kms.image" -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end -}}
{{- end }}

{{- define "progressdb-kms.ownImage" -}}
image: {{ include "progressdb-kms.image" (dict "repository" .Values.image.repository "tag" (default .Chart.AppVersion .Values.image.tag) "digest" .Values.image.digest) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* The restricted Pod Security Standard; only the numbers are values, and null leaves them to the cluster. */}}
{{- define "progressdb-kms.podSecurity" -}}
runAsNonRoot: true
{{- range $key := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- if not (kindIs "invalid" (index $.numbers $key)) }}
{{ $key }}: {{ int64 (index $.numbers $key) }}
{{- end }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "progressdb-kms.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end }}

{{- define "progressdb-kms.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Names of Secrets, and which mode makes them. */}}
{{- define "progressdb-kms.redisTlsMode" -}}
{{- default .Values.tls.mode .Values.redis.tls.mode -}}
{{- end }}

{{- define "progressdb-kms.kekSecret" -}}
{{- default (printf "%s-kek" (include "progressdb-kms.fullname" .)) .Values.kek.secretName -}}
{{- end }}

{{/* The Secret with the audit key, empty where the log is not chained. */}}
{{- define "progressdb-kms.auditSecret" -}}
{{- if .Values.audit.secretName }}{{ .Values.audit.secretName }}
{{- else if .Values.audit.enabled }}{{ include "progressdb-kms.fullname" . }}-audit
{{- end -}}
{{- end }}

{{- define "progressdb-kms.storeIdKey" -}}
{{- if eq .Values.kek.management "create" }}{{ default "store-id" .Values.kek.storeIdKey }}{{ else }}{{ .Values.kek.storeIdKey }}{{ end -}}
{{- end }}

{{- define "progressdb-kms.serverSecret" -}}
{{- if eq .Values.tls.mode "existingSecret" }}{{ .Values.tls.existingSecret.server }}{{ else }}{{ include "progressdb-kms.fullname" . }}-server-tls{{ end -}}
{{- end }}

{{/* Where the CAs of the clients are: a YAML mapping of secret and key. Never the ca.crt of a leaf. */}}
{{- define "progressdb-kms.clientTrust" -}}
{{- if eq .Values.tls.mode "existingSecret" -}}
{secret: {{ .Values.tls.existingSecret.clientCa }}, key: {{ .Values.tls.existingSecret.clientCaKey }}}
{{- else if and (eq .Values.tls.mode "certManager") .Values.tls.certManager.client.issuerRef.name -}}
{secret: {{ .Values.tls.certManager.client.trustSecret }}, key: {{ .Values.tls.certManager.client.trustKey }}}
{{- else -}}
{secret: {{ include "progressdb-kms.fullname" . }}-client-ca-bundle, key: ca.crt}
{{- end -}}
{{- end }}

{{- define "progressdb-kms.redisAuthSecret" -}}
{{- default (printf "%s-redis-auth" (include "progressdb-kms.fullname" .)) .Values.redis.existingAuthSecret -}}
{{- end }}

{{/* Where the files come from with which a caller opens the store: a YAML mapping of the Secret and key of each. */}}
{{- define "progressdb-kms.storeFiles" -}}
{{- $r := include "progressdb-kms.fullname" . -}}
{{- if .Values.redis.enabled }}
password: {secret: {{ include "progressdb-kms.redisAuthSecret" . }}, key: kms}
{{- if eq (include "progressdb-kms.redisTlsMode" .) "existingSecret" }}
ca.crt: {secret: {{ .Values.redis.tls.existingSecret.ca }}, key: {{ .Values.redis.tls.existingSecret.caKey }}}
tls.crt: {secret: {{ .Values.redis.tls.existingSecret.client }}, key: tls.crt}
tls.key: {secret: {{ .Values.redis.tls.existingSecret.client }}, key: tls.key}
{{- else }}
ca.crt: {{ include "progressdb-kms.redisTrust" . }}
tls.crt: {secret: {{ $r }}-redis-client-tls, key: tls.crt}
tls.key: {secret: {{ $r }}-redis-client-tls, key: tls.key}
{{- end }}
{{- else }}
{{- with .Values.externalStore }}
password: {secret: {{ .secretName }}, key: {{ .passwordKey }}}
{{- if .caKey }}
ca.crt: {secret: {{ .secretName }}, key: {{ .caKey }}}
{{- end }}
{{- if .certKey }}
tls.crt: {secret: {{ .secretName }}, key: {{ .certKey }}}
tls.key: {secret: {{ .secretName }}, key: {{ .keyKey }}}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The CA of the in-chart store and its callers. */}}
{{- define "progressdb-kms.redisTrust" -}}
{{- $r := include "progressdb-kms.fullname" . -}}
{{- if eq (include "progressdb-kms.redisTlsMode" .) "existingSecret" -}}
{secret: {{ .Values.redis.tls.existingSecret.ca }}, key: {{ .Values.redis.tls.existingSecret.caKey }}}
{{- else if and (eq (include "progressdb-kms.redisTlsMode" .) "certManager") .Values.tls.certManager.redis.issuerRef.name -}}
{secret: {{ .Values.tls.certManager.redis.trustSecret }}, key: {{ .Values.tls.certManager.redis.trustKey }}}
{{- else -}}
{secret: {{ $r }}-redis-ca-bundle, key: ca.crt}
{{- end -}}
{{- end }}

{{/* DNS names of a Service: (dict "root" $ "service" "R-redis"). */}}
{{- define "progressdb-kms.dnsNames" -}}
{{- $ns := .root.Release.Namespace -}}
{{- list .service (printf "%s.%s" .service $ns) (printf "%s.%s.svc" .service $ns) (printf "%s.%s.svc.%s" .service $ns .root.Values.clusterDomain) | toJson -}}
{{- end }}

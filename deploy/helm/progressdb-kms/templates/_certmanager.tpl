{{/*
A client's certificate is issued in the release's namespace and handed over by provision where the CA is the release's own:
an Issuer serves its own namespace only. A ClusterIssuer issues it in the client's namespace itself.
*/}}
{{- define "progressdb-kms.clientIsCopied" -}}
{{- $ref := .root.Values.tls.certManager.client.issuerRef -}}
{{- if or (not $ref.name) (eq $ref.kind "Issuer") }}true{{ end -}}
{{- end }}

{{/* The Secret that cert-manager writes for a client whose certificate is handed over. */}}
{{- define "progressdb-kms.clientSource" -}}
{{- printf "%s-issued-%s-%s" (include "progressdb-kms.fullname" .root) .client.namespace .client.name -}}
{{- end }}

{{/* What clients check the server against: the CA of the release, or what the issuer says of itself. */}}
{{- define "progressdb-kms.serverTrust" -}}
{{- $r := include "progressdb-kms.fullname" . -}}
{{- if .Values.tls.certManager.server.issuerRef.name -}}
{secret: {{ $r }}-server-tls, key: ca.crt}
{{- else -}}
{secret: {{ $r }}-server-ca, key: tls.crt}
{{- end -}}
{{- end }}

{{/* issuerRef of a purpose: (dict "root" $ "purpose" "client"). */}}
{{- define "progressdb-kms.issuerRef" -}}
{{- $ref := (index .root.Values.tls.certManager .purpose).issuerRef -}}
{{- if $ref.name -}}
{name: {{ $ref.name }}, kind: {{ default "Issuer" $ref.kind }}, group: {{ default "cert-manager.io" $ref.group }}}
{{- else -}}
{name: {{ include "progressdb-kms.fullname" .root }}-{{ .purpose }}-ca, kind: Issuer, group: cert-manager.io}
{{- end -}}
{{- end }}

{{/* A Certificate: (dict "root" $ "name" "-server-tls" "secret" "x" "purpose" "server" "usage" "server auth" "subject" {...} "rotate" true). */}}
{{- define "progressdb-kms.certificate" -}}
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  {{- if .fullname }}
  {{- $metadata := include "progressdb-kms.metadata" (dict "root" .root "name" "" "component" "tls" "namespace" .namespace) | fromYaml }}
  {{- $_ := set $metadata "name" .fullname }}
  {{- toYaml $metadata | nindent 2 }}
  {{- else }}
  {{- include "progressdb-kms.metadata" (dict "root" .root "name" .name "component" "tls" "namespace" .namespace) | nindent 2 }}
  {{- end }}
spec:
  secretName: {{ .secret }}
  secretTemplate:
    labels: {progressdb-kms.io/release: {{ .root.Release.Name }}}
  issuerRef: {{ include "progressdb-kms.issuerRef" . }}
  duration: {{ .root.Values.tls.certManager.duration }}
  renewBefore: {{ .root.Values.tls.certManager.renewBefore }}
  privateKey:
    algorithm: {{ .root.Values.tls.certManager.privateKey.algorithm }}
    size: {{ .root.Values.tls.certManager.privateKey.size }}
    encoding: PKCS8
    # Never: a pinned client is known by its key, which must survive renewals.
    rotationPolicy: {{ ternary "Always" "Never" .rotate }}
  usages: [digital signature, {{ .usage }}]
  {{- toYaml .subject | nindent 2 }}
{{- end }}

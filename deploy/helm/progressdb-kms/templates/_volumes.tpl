{{/*
The one volume with all files of a container, at /etc/progressdb-kms: configuration, policy, KEK, certificates, the store's
password. Projected, and never by subPath, so that changes of Secrets reach it, all of them by one swap of a symlink.
0440 with the pod's fsGroup: the service refuses a key that others could read.
(dict "root" $ "parts" (list "config" "policy" "kek" "tls" "store" "escrow" "audit"))
*/}}
{{- define "progressdb-kms.filesVolume" -}}
{{- $r := include "progressdb-kms.fullname" .root -}}
- name: files
  projected:
    defaultMode: 0440
    sources:
      {{- if has "config" .parts }}
      - configMap:
          name: {{ $r }}-config
          items: [{key: config.yaml, path: config.yaml}]
      {{- end }}
      {{- if has "policy" .parts }}
      - configMap:
          name: {{ $r }}-policy
          items: [{key: policy.yaml, path: policy.yaml}]
      {{- end }}
      {{- if has "provision" .parts }}
      - configMap:
          name: {{ $r }}-provision
          items: [{key: {{ .provisionKey }}, path: provision.yaml}]
      {{- end }}
      {{- if has "kek" .parts }}
      - secret:
          name: {{ include "progressdb-kms.kekSecret" .root }}
          items:
            - {key: {{ .root.Values.kek.key }}, path: kek/kek.yaml}
            {{- with include "progressdb-kms.storeIdKey" .root }}
            - {key: {{ . }}, path: kek/store-id}
            {{- end }}
      {{- end }}
      {{- if has "tls" .parts }}
      - secret:
          name: {{ include "progressdb-kms.serverSecret" .root }}
          items: [{key: tls.crt, path: tls/tls.crt}, {key: tls.key, path: tls/tls.key}]
      {{- $trust := include "progressdb-kms.clientTrust" .root | fromYaml }}
      - secret:
          name: {{ $trust.secret }}
          items: [{key: {{ $trust.key }}, path: client-ca/ca.crt}]
      {{- with .root.Values.tls.clientCrl }}
      {{- if .secretName }}
      - secret:
          name: {{ .secretName }}
          items: [{key: {{ .key }}, path: client-ca/crl.pem}]
      {{- end }}
      {{- end }}
      {{- end }}
      {{- if has "store" .parts }}
      {{- range $path, $from := include "progressdb-kms.storeFiles" .root | fromYaml }}
      - secret:
          name: {{ $from.secret }}
          items: [{key: {{ $from.key }}, path: store/{{ $path }}}]
      {{- end }}
      {{- end }}
      {{- $audit := include "progressdb-kms.auditSecret" .root }}
      {{- if and (has "audit" .parts) $audit }}
      - secret:
          name: {{ $audit }}
          items: [{key: {{ .root.Values.audit.key }}, path: audit/audit.yaml}]
      {{- end }}
      {{- if and (has "escrow" .parts) .root.Values.escrow.recipients }}
      - configMap:
          name: {{ $r }}-config
          items:
            {{- range $index, $_ := .root.Values.escrow.recipients }}
            - {key: escrow-{{ $index }}.pem, path: escrow/{{ $index }}.pem}
            {{- end }}
      {{- end }}
{{- end }}

{{- define "progressdb-kms.filesMount" -}}
- {name: files, mountPath: /etc/progressdb-kms, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{/* /tmp in memory: provision writes a client key there for a moment, and nothing of it should meet a disk. */}}
{{- define "progressdb-kms.tmpVolume" -}}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 16Mi}
{{- end }}
